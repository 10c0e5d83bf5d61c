"""A look inside a model: what each layer does to a sentence, in numbers and as a page."""
