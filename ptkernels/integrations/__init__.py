"""Other libraries' ways of choosing an implementation, taught about ptkernels. Nothing here is imported by the package."""
