"""Parts that several operators share; the folders of operators do not import each other."""
