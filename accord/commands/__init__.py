"""The subcommands of ``accord``, by family: each adds its parsers and carries them out by calls of the layers below."""
