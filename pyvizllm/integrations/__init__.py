"""Other libraries' models with what is here; a module each, imported by name."""
