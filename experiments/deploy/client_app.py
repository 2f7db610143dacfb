"""The client side of a deployment's Flower app: the device that ``FLOWERBED_DEVICE`` describes."""

from __future__ import annotations

import os

from flowerbed.clients.device import device_app

DEVICE = "FLOWERBED_DEVICE"
"""Environment variable with the path of the device's configuration; ``flowerbed deploy node`` sets it."""

app = device_app(os.environ.get(DEVICE, "device.toml"))
