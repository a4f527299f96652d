"""Weight transports: ways to bring the policy's weights to inference servers.

``transport.py`` defines the interface: a ``WeightTransport`` opens a ``WeightUpdate`` to some servers, which sends
buckets of tensors, verifies checksums and names the new version. The implementations are

* ``stages.py``: from one rank per pipeline stage at the same time (``stage_sender.py``): streams that embedded servers
  pass on, or a kept torch.distributed group (``kept_group.py``).
* ``tensor.py``: tensors in HTTP bodies; any machines. The default for servers that are not this process's children.
* ``disk.py``: a folder that trainer and servers share; the only transport for vLLM.
* ``distributed.py``: torch.distributed broadcasts in the groups of ``weight_group.py``; for SGLang on GPUs.
* ``ipc.py``: memory shared by processes of one machine (``shared_memory.py``); the default for embedded servers on
  CPUs.

``rollout.fleet_setup`` chooses a transport from ``weights.carrier``, ``fleet.sync`` drives it, and ``inference_server``
is the receiving side. ``checksum.py`` has the checksums that sender and receiver compare.
"""
