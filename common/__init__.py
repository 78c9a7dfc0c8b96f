"""Training on many ranks: the framework-independent parts, and torch/ and tf/ for each framework."""
