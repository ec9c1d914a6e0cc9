"""What ComfyUI's server answers under /stretto: who may ask, what is known, and the panel as a child process."""
