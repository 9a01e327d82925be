"""A package, so that no other one of this name is imported: some that are installed bring their tests along."""
