"""What training minimises beside the plain log-loss: losses that several tasks share."""
