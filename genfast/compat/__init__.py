"""Drop-ins for other libraries: change one import, keep the rest. docs/k-diffusion.md."""
