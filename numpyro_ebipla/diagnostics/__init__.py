"""Is a fit to be trusted?"""
