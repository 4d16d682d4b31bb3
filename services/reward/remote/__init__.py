"""Scorers elsewhere: reward models behind gRPC or HTTP, LLM judges, classification models in SGLang."""
