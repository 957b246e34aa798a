"""Adaptive drafting: how many drafts pay, chosen for every cycle. Nothing imports it unless a policy is asked for."""
