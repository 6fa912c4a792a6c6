"""How processes start and find each other. The only room that writes to the environment."""
