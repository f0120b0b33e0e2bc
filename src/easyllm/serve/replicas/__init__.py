"""A server as several replicas: Ray Serve runs the models, one process answers the clients.

The front (`front`) has the listening socket, the API key, the page and the history. Every other
request goes to a replica (`replica`), which runs the same application as a server without replicas.
A replica that dies costs only the requests whose response had begun: the front sends the others to
another replica, and Ray Serve starts a new one.
"""

from easyllm.serve.replicas.run import serve_replicas

__all__ = ["serve_replicas"]
