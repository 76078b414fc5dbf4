"""Whole models: convert, fold, freeze, calibrate, and read other people's checkpoints."""
