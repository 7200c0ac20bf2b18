"""Figures of services for monitoring systems: metrics.py names them, exporter.py serves them to Prometheus.

Imports the queue, and neither clients nor workers. Only this package imports prometheus_client.
"""
