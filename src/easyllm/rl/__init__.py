"""Reinforcement learning: rollouts, rewards, advantages, policy losses and a doctor for runs.

Importing this package registers its objectives and data kinds for recipes.
"""
