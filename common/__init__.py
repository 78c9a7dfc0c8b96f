"""How a model is trained on many ranks: the rules, and below torch/ and tf/ how each framework carries them out."""
