"""What a trained model can do: benchmarks through lm-eval, and perplexity per domain."""
