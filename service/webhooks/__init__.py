"""Telling a tenant's server what happened, by Standard Webhooks 1.0. Without a database: who stores and loops is elsewhere.

events says what may be told, signing proves that it came from us, guard decides where it may go, sender takes it there
once, schedule says when to try again.
"""
