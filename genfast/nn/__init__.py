"""Layers that the networks in `genfast.models` are made of."""

from genfast.nn.conv import ConvBlock
from genfast.nn.layers import Attention, Downsample, ResBlock, TimeEmbedding, Upsample

__all__ = ["Attention", "ConvBlock", "Downsample", "ResBlock", "TimeEmbedding", "Upsample"]
