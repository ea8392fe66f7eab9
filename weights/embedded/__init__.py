"""The small trained model that ships with the package."""
