"""Other libraries' models and trainers with what is here; a module each, imported by name."""
