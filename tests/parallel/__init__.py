"""Tests of stages, servers, schedules, and what a layout costs."""
