"""Truths, problems, jobs and builds that several tests share."""
