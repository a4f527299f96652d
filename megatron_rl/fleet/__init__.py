"""The rollout fleet: a client of several inference servers that behaves like one.

``fleet.py`` is the entry point (``Fleet.open``); ``client.py``, ``vllm.py`` and ``router.py`` speak to one server each
over the protocol of ``protocol.py``, ``receivers.py`` does so in processes of their own; ``dispatch.py`` assigns
requests to servers; ``members.py`` tracks which servers are healthy; ``sync.py`` pushes weights;
``process.py``, ``sglang.py`` and ``servers.py`` start servers or find running ones.
"""
