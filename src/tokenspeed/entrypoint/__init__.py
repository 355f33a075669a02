"""Owns the gRPC servicer and the launch of the gateway; never imports torch."""
