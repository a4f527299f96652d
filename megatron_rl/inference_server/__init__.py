"""The embedded inference server: SGLang's HTTP API over a Hugging Face model. Small and readable, for CPUs and tests.

``serve.py`` is the program, ``server.py`` the HTTP handlers, ``engine.py`` the model thread, which runs ``prefill.py``
and ``decode.py``. SGLang is the engine for GPUs.
"""
