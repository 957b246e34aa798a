"""The model that is trained: DFlash backbone, Domino head, their checkpoints and their fit to a target."""
