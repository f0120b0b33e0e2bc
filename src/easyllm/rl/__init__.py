"""Reinforcement learning: rollouts, rewards, advantages, policy losses and a doctor for runs.

Importing `easyllm.rl.register` registers its objectives and data kinds for recipes.
"""
