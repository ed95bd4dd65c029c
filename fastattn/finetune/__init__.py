"""The main job: fine-tune a frozen encoder on labelled text, and show what fastattn changed about it."""
