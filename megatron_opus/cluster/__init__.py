"""What has to be known before and around a run on many nodes: recipes against layouts, nodes against expectations."""
