"""The configuration: its schema, composition and validation."""
