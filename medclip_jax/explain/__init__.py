"""Where the anomaly is and why, in forms that a reader can check: boxes and Grad-CAM.

Checks of a run say whether these point at lesions, agree, and matter to the model.
"""
