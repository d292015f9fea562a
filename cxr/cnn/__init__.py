"""What lies between a CNN of the user's own and the logit that is explained."""
