"""How a model is distributed over ranks: pipelines, parameter servers. With PyTorch."""
