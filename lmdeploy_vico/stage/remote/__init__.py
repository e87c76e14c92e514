"""Encoders that are not in the server's process: actors of a Ray cluster, which come, go and serve several servers.

Only :mod:`.cluster` and :mod:`.command` know Ray. Everything else speaks to a
:class:`~lmdeploy_vico.stage.remote.channel.Cluster`.
"""
