"""What lies on a disk: configurations, weights, quantized models, dumps. Nothing here computes with a model."""
