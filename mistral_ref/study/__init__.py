"""What one sees in a pass: lenses, figures, the page, the stepper, planted bugs."""
