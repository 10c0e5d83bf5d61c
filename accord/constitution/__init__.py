"""Constitutional AI: principles, and models that judge answers by them."""
