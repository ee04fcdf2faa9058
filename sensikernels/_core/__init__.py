"""What every layer stands on: errors, checks, files, the compiled extension, the environment."""
