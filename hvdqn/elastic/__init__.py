"""Elastic training: ranks may join and leave while the job runs. Started by launch/elastic.sh."""
