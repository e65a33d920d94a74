"""What a pass costs: counted, predicted and measured; how surprised a model is by a text."""
