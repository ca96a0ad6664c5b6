"""Layers that the networks in `genfast.models` are made of."""

from genfast.nn.attention import Attention
from genfast.nn.conv import ConvBlock
from genfast.nn.dropout import Dropout
from genfast.nn.layers import AttentionBlock, Downsample, ResBlock, TimeEmbedding, Upsample

__all__ = ["Attention", "AttentionBlock", "ConvBlock", "Downsample", "Dropout", "ResBlock", "TimeEmbedding", "Upsample"]
