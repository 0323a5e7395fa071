"""maxact plugin."""


def register() -> None:
    """vLLM entry point."""
