"""Training a draft: answers, features, anchors, losses, the loop, and simulated tau."""
