"""Other libraries' ways of choosing an implementation. Nothing here is imported by the package itself."""
