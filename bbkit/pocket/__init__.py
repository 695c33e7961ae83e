"""What the package ships: the fact table, the pocket model, and the recipes that rebuild both."""
