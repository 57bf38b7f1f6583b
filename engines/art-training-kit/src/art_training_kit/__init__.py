"""What every training engine shares; see the modules. Importing the package imports nothing heavy."""
