"""Text generation: requests join and leave the running batch at every step. Imports torch and transformers.

`sequence.py` is one text as it grows, from its options to its result; `record.py` its tokens as bytes, from which
another run goes on. `sampling.py` chooses tokens, `grammar.py` says which are allowed, `detokenizer.py` and `stops.py`
turn them into text, `templates.py` makes the tokens of a prompt. Nothing here knows the queue.

`model.py` loads a model, which `checks.py` refuses or proves. `engine.py` runs the texts: `held.py` has them and their
blocks (`blocks.py`), `scheduler.py` decides what a step computes, `forward.py` computes it, over the cache of
`kv_cache.py`, with the attention of `attention.py`. For models that `decoder.py` knows, it computes the layers, and
`columns.py` keeps the keys and values of growing texts side by side.
"""
