from .figures import report_figure as report_figure
from .figures import training_curve as training_curve
from .figures import training_figure as training_figure
from .notebook import curve_html as curve_html
from .notebook import one_line as one_line
from .notebook import page as page
from .notebook import table as table
