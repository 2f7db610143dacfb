"""The same federation on real devices: a Flower SuperLink, a SuperNode on every device, and the tools of an operator.

What runs on a device (``node``, ``supernode``, ``worker``, ``client_app``) needs the base install only.
"""
