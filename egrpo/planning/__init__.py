"""From a run's settings to its grid, plan, trees and cost."""
